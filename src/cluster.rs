//! Access to the Kubernetes API: finding a server, watching Nodes and Peers, publishing.
