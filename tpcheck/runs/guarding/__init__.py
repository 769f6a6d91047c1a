"""`guard`: during a run of weeks, do the replicas still agree?"""
