"""The Berkeley Function-Calling Leaderboard, version 4: its single-turn cases, its rules, its averages."""
