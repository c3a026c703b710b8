"""What works on this machine and what does not, each with its mend: what `launch/doctor.py` finds out."""
