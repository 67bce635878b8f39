"""The four services of DeepFlow; they meet on the bus only and never import each other."""
