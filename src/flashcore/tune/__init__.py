"""This package is the search behind `flashcore tune`. `flashcore.selection.space` lists
configurations, `flashcore.selection.compiling` and `timing` judge them, `search` puts it together;
`flashcore.selection.tuned` keeps what was found and hands it to plans."""
