"""`lasp check`: a model split over processes, compared with the same model in one."""
