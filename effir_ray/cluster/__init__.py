"""Where Ray is: a private instance on this machine, a cluster at an address, and jobs sent to one.

Read ``connection`` first; ``jobs`` runs commands of effir-ray over a cluster's job server.
"""
