//! The places of a lab by their addresses of one family: what a claim is made about.

use anyhow::Context as _;

use super::Lab;
use crate::family::Family;
use crate::traffic::Place;

/// A lab, seen by one address family: the primary one unless [`Lab::of`] names another.
pub trait Places {
    /// The lab.
    fn lab(&self) -> &Lab;

    /// The family.
    fn family(&self) -> Family;

    /// Every pod and every host that has an address of the family.
    fn places(&self) -> Vec<Place> {
        let (lab, family) = (self.lab(), self.family());
        let nodes = || lab.network.nodes().iter();
        let pods = nodes().filter_map(|node| {
            let pod = lab.pods.get(node.name())?;
            Some(Place {
                name: format!("pod@{}", node.name()),
                node: node.name().to_owned(),
                pod: true,
                address: pod.address_of(family)?,
                namespace: pod.namespace().path(),
            })
        });
        let hosts = nodes().filter_map(|node| {
            Some(Place {
                name: node.name().to_owned(),
                node: node.name().to_owned(),
                pod: false,
                address: node.address_of(family)?,
                namespace: node.namespace().path(),
            })
        });
        pods.chain(hosts).collect()
    }

    /// The place of that name: `pod@node-master` or `node-master`.
    ///
    /// # Errors
    ///
    /// When there is none.
    fn place(&self, name: &str) -> anyhow::Result<Place> {
        self.places()
            .into_iter()
            .find(|place| place.name == name)
            .with_context(|| format!("the lab has no place {name} of this family"))
    }
}

impl Places for Lab {
    fn lab(&self) -> &Lab {
        self
    }

    fn family(&self) -> Family {
        let shape = self.options.shape;
        let mut families = shape.inner.families(shape.wan).into_iter();
        families.next().unwrap_or_default()
    }
}

/// A lab, seen by one of its families.
#[derive(Clone, Copy, Debug)]
pub struct OfFamily<'a> {
    pub(super) lab: &'a Lab,
    pub(super) family: Family,
}

impl Places for OfFamily<'_> {
    fn lab(&self) -> &Lab {
        self.lab
    }

    fn family(&self) -> Family {
        self.family
    }
}
