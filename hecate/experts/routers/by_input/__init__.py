"""New routers by what they decide by, one a file, by its name. Each has a `ROUTER`, which makes one of a `RouterSite` (docs/extend)."""
