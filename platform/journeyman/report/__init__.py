"""One static HTML page a run: values in, `index.html` and its figures out."""
