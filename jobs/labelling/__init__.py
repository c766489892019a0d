"""Parts of ``maskmill label``: its options, the table it adds to, how it starts, and what it tells."""
