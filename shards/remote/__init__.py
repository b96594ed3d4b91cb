"""Sets at a URL: storage, a local cache of their shards, fetching ahead, copies."""
