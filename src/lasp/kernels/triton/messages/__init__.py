"""Messages that begin with a header: which call they belong to."""
