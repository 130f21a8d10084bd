"""The site: what site.toml says of the cluster at hand."""
