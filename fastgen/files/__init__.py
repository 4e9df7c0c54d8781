"""Everything that touches a disk: JSON, TOML, folders, hashes, the cache folder, names, PNG files."""
