"""`theodora studio`: a page on loopback that shows the commands, and starts, follows, stops and resumes their runs.

It is a face of the command line, not a second program: a run that is started here is `theodora train` in a process of
its own, with an ordinary output folder. What the page knows it reads from such folders, each time anew.
"""
