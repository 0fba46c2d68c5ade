"""The ground floor holds environment variables, this machine, files that processes share."""
