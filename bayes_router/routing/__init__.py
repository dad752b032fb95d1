"""Where a token goes, and how sure that is; no attention here."""
