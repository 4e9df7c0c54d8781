"""A job: a file of requests -> a folder of images, resumable, in shards."""
