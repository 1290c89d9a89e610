"""Certificates, enrolment and startup kits."""
