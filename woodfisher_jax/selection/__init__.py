"""From scores to masks: scopes, patterns, costs."""
