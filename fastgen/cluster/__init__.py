"""A job on the machines of a Ray cluster: the pictures are made there, the folder is written here."""
