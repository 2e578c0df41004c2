"""`nvmove bench`: what nvmove costs, measured beside what it is compared with."""
