//! What an operator would look at on a node, in a form that can be compared.

use std::collections::BTreeMap;

use super::Lab;

impl Lab {
    /// What an operator would look at on a node: links, addresses, rules, all tables, firewalls.
    ///
    /// Counters, timers and other things that change by themselves are left out, so that two dumps
    /// of an unchanged node are equal.
    ///
    /// # Errors
    ///
    /// When one of the commands fails.
    pub fn dump(&self, node: &str) -> anyhow::Result<BTreeMap<&'static str, String>> {
        let node = self.node(node)?;
        let mut dump = BTreeMap::new();
        for line in [
            "ip -4 rule",
            "ip -6 rule",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "ip -o link",
            "ip -o address",
            "ip neighbour show nud permanent",
            "bridge fdb show",
            "nft -s list ruleset",
            "iptables-legacy-save",
            "ip6tables-legacy-save",
            "sysctl -a -r ^net\\.",
        ] {
            let text = node.run(line).unwrap_or_else(|error| error.to_string());
            dump.insert(line, steady(&text));
        }
        Ok(dump)
    }
}

/// A dump without the lines and words that change without any cause.
fn steady(text: &str) -> String {
    let mut steady = Vec::new();
    for line in text.lines() {
        let passing = ["conntrack", "nf_log", ".neigh.", "ipfrag_", "ip6frag"];
        if line.starts_with('#')
            || line.starts_with(':')
            || (line.starts_with("net.") && passing.iter().any(|word| line.contains(word)))
        {
            continue;
        }
        // Numbers of links change when one is deleted and added again.
        let (number, rest) = line.split_once(": ").unwrap_or(("", line));
        let line = if number.parse::<u32>().is_ok() {
            rest
        } else {
            line
        };
        let words = line
            .split_whitespace()
            .take_while(|word| *word != "expires" && *word != "valid_lft");
        steady.push(words.collect::<Vec<_>>().join(" "));
    }
    // So does their order. An nft ruleset loses nothing by this that a difference would not show.
    steady.sort();
    steady.join("\n")
}
