"""An exchange through memory that ranks of one host write into directly."""
