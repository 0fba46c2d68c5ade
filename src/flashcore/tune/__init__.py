"""The search behind `flashcore tune`. `space` lists configurations, `compiling` and `timing` judge
them, `search` puts it together; `flashcore.tuned` keeps what was found and hands it to plans."""
