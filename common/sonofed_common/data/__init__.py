"""Ultrasound images: readers, duplicate groups, patient-level splits and transforms."""
