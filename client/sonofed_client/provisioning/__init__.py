"""The hospital's half of enrolment: its keys, its request and its kit."""
