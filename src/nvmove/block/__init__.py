"""Where the data lies: back ends that read and write straight into guest memory and answer with an errno."""
