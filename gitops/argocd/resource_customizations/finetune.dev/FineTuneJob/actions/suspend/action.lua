-- Save a checkpoint and give the pods back.
obj.spec.suspend = true
return obj
