"""The site: what site.toml says about the cluster."""
