"""Label datasets: their schema, their files, and the Ray Data pipeline that fills them."""
