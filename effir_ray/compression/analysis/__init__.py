"""What every sublayer weighs, costs and matters, as tables and a page.

Read ``summary`` (the numbers), then ``figures`` and ``page`` (how they look) and ``analyze`` (the command).
"""
