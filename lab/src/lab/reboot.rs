//! A node that loses its power and comes back: what the kernel and `/run` held is gone, the disk stays.

use std::fs;

use super::{Lab, Parts};
use crate::flannel::SUBNET_ENV;
use crate::pod::Pod;

impl Lab {
    /// Takes from a node what a reboot takes: its agent, flannel and pod, all links but its network card,
    /// rules, tables and the firewall. Its kubeconfig stays, which a kubelet would give an agent again.
    ///
    /// # Errors
    ///
    /// When a command fails.
    pub fn power_off(&mut self, node: &str) -> anyhow::Result<()> {
        if let Some(agent) = self.agents.remove(node) {
            agent.kill();
        }
        if let Some(flanneld) = self.flanneld.remove(node) {
            flanneld.kill();
        }
        self.pods.remove(node);
        let machine = self.network.node(node)?;
        machine.namespace().sh(
            "for link in $(ip -o link show | cut -d: -f2 | cut -d@ -f1); do
               case $link in lo|eth0) ;; *) ip link delete $link 2>/dev/null || true ;; esac
             done
             for family in -4 -6; do
               ip $family rule flush
               ip $family rule add pref 32766 lookup main
               for table in 5130 5131 5132; do ip $family route flush table $table 2>/dev/null || true; done
             done
             ip rule add pref 32767 lookup default
             nft flush ruleset
             iptables-legacy -F && iptables-legacy -t nat -F && iptables-legacy -X && iptables-legacy -t nat -X",
        )?;
        fs::remove_file(machine.outside(SUBNET_ENV))?;
        // The container runtime gives back the addresses of pods that did not survive.
        let addresses = machine.outside("/var/lib/cni/networks");
        if addresses.exists() {
            fs::remove_dir_all(addresses)?;
        }
        Ok(())
    }

    /// Starts flannel on a node that was off, and a pod beside it.
    ///
    /// # Errors
    ///
    /// When flannel does not come up, or the pod cannot be made.
    pub fn power_on(&mut self, node: &str) -> anyhow::Result<()> {
        self.start_flannel(node)?;
        self.wait_flannel(node)?;
        let machine = self.network.node(node)?;
        let name = format!("{}-pod-{node}", self.network.prefix());
        let pod = Pod::create(machine, &name, self.options.parts == Parts::Real)?;
        self.pods.insert(node.to_owned(), pod);
        Ok(())
    }
}
