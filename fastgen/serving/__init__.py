"""`fastgen serve`: requests over HTTP that join a running batch at any step."""
