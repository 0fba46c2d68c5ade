"""The ground floor: environment variables, this machine, files that processes share."""
