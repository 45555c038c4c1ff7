"""From audio states to text: token rules, searches, and the recogniser that puts them together."""
