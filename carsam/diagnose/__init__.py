"""Where a packed model departs from its float original (METHOD.md, 10): attentions, stages, sites, masks."""
