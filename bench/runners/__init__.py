"""Runners: each module measures one kind of target and is named after it."""
