"""The rule table: each module holds the rules of one subject; adding a rule touches that module and its test."""
