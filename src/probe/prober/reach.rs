//! Which segments each leader reaches directly, what it tells the others of that, and the relays that follow.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::super::message::{Bitmap, Message};
use super::super::relay::{Relays, Way};
use super::super::responder::Sender;
use super::{Key, Prober, Via};
use crate::liveness::PathState;
use crate::probe::targets::Lead;
use crate::topology::SegmentName;

/// What is known of direct paths.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// What other leaders say.
    statements: BTreeMap<Key, Statement>,
    pub(super) relays: Relays,
    /// The segments that this leader does not reach directly, as a bitmap over all segments, and the generation of
    /// that list.
    lacking: Option<(u64, Bitmap)>,
}

/// What a leader last said.
#[derive(Debug)]
struct Statement {
    generation: u64,
    lacking: Bitmap,
    /// To a leader of its region the segments that it reaches directly, to others those to which it relays.
    segments: BTreeSet<SegmentName>,
}

impl Reach {
    /// When the relays are to be looked at again.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.relays.poll_timeout()
    }
}

impl Prober {
    /// Forgets what nodes said that are no leaders any more. The names of segments stay valid when the list changes.
    pub(super) fn retain_statements(&mut self) {
        let probes = &self.probes;
        self.reach
            .statements
            .retain(|key, _| probes.contains_key(key));
    }

    /// Takes what an echo says of its sender's direct paths.
    pub(super) fn take_statement(&mut self, sender: &Sender, echo: &Message) {
        let key = match sender {
            Sender::Peer(id) => Key::Peer(id.clone()),
            Sender::Member(address) => {
                let lead = self.targets.lead.as_ref();
                let Some(name) = lead.and_then(|lead| lead.members.get(address)) else {
                    return;
                };
                Key::Leader(name.clone())
            }
        };
        if !self.probes.contains_key(&key) {
            return;
        }
        let generation = echo.generation;
        if !echo.direct {
            self.changed |= self.reach.statements.remove(&key).is_some();
            return;
        }
        // The sender sees other segments than this node: what it said before still holds.
        let is_same_list = self.reach.lacking.is_some_and(|(own, _)| own == generation);
        let is_news = self.reach.statements.get(&key).is_none_or(|before| {
            (before.generation, &before.lacking) != (generation, &echo.unreached)
        });
        if !is_same_list || !is_news {
            return;
        }
        let numbered = self.targets.all_segments.iter().enumerate();
        let reached = numbered.filter(|(number, _)| echo.covers(*number) && !echo.lacks(*number));
        let statement = Statement {
            generation,
            lacking: echo.unreached,
            segments: reached.map(|(_, name)| name.clone()).collect(),
        };
        self.reach.statements.insert(key, statement);
        self.changed = true;
    }

    /// The segments that a leader says it reaches directly, or relays to.
    pub(super) fn stated(&self, key: &Key) -> Option<&BTreeSet<SegmentName>> {
        let statement = self.reach.statements.get(key);
        statement.map(|statement| &statement.segments)
    }

    /// A path or a statement may have changed: looks at the relays, and at what to tell the others.
    pub(super) fn follow_reach(&mut self, now: Instant) {
        let Some(lead) = &self.targets.lead else {
            self.reach = Reach::default();
            return;
        };
        let ways = lead.peers.iter().filter_map(|(id, far)| {
            let key = Key::Peer(id.clone());
            let path = &self.probes.get(&key)?.path;
            let way = Way {
                node: far.node.clone(),
                segment: far.segment.clone(),
                group: far.group.clone(),
                state: path.state(),
                since: path.since(),
                rtt: path.rtt(),
                relayed: lead.relayed.contains(id),
                rank: far.relay_rank,
                relays_to: self.stated(&key).cloned().unwrap_or_default(),
            };
            Some((id.clone(), way))
        });
        let ways = ways.collect::<BTreeMap<_, _>>();
        let siblings = self.reached_by_siblings();
        self.reach.relays.handle_ways(now, &ways, &siblings);

        let mut reached = BTreeSet::new();
        for way in ways.values() {
            // The tunnel's counters say a moment later that a path goes through a relay.
            let has_relay = self.reach.relays.relay(&way.segment).is_some();
            let is_up = matches!(way.state, PathState::Up | PathState::Returning);
            if is_up && !way.relayed && !has_relay {
                reached.insert(&way.segment);
            }
        }
        let mut bitmap = Message::NOTHING;
        for (number, name) in self.targets.all_segments.iter().enumerate() {
            if !reached.contains(name) {
                Message::mark(&mut bitmap, number);
            }
        }
        let generation = match self.reach.lacking {
            Some((generation, _)) => generation,
            None => self.targets.generation_of_all(),
        };
        self.reach.lacking = Some((generation, bitmap));
    }

    /// The list of all segments is another one.
    pub(super) fn forget_own_reach(&mut self) {
        self.reach.lacking = None;
    }

    /// Adds to an echo what its receiver may know of this leader's direct paths.
    pub(super) fn state_reach(&self, now: Instant, to: &Key, echo: Message) -> Message {
        let (Some(lead), Some((generation, lacking))) = (&self.targets.lead, self.reach.lacking)
        else {
            return echo;
        };
        let relays = lead.relays && !self.draining && self.forwards(now, lead);
        let unreached = match to {
            Key::Peer(_) if !relays => [u8::MAX; 64],
            Key::Peer(_) | Key::Leader(_) => lacking,
        };
        Message {
            direct: true,
            generation,
            unreached,
            ..echo
        }
    }

    /// The segments that another leader of the own region reaches directly.
    fn reached_by_siblings(&self) -> BTreeSet<SegmentName> {
        let siblings = self.probes.iter().filter(|(key, probe)| {
            matches!(key, Key::Leader(_)) && probe.path.state() == PathState::Up
        });
        let stated = siblings.filter_map(|(key, _)| self.stated(key));
        stated.flatten().cloned().collect()
    }

    /// The numbers of the segments of which no leader answers. One that never answered is not reached: members prefer
    /// a leader that knows a way, and use this one as well where none does. The same holds for one that is reached
    /// through a relay, while another leader of the region reaches it directly.
    pub(super) fn unreached(&self, lead: &Lead) -> Vec<usize> {
        let siblings = match lead.relayed.is_empty() {
            true => BTreeSet::new(),
            false => self.reached_by_siblings(),
        };
        let mut reached = BTreeMap::<&SegmentName, bool>::new();
        for (id, far) in &lead.peers {
            let probe = self.probes.get(&Key::Peer(id.clone()));
            let is_reached = probe.is_none_or(|probe| probe.path.state().answers())
                && !(lead.relayed.contains(id) && siblings.contains(&far.segment));
            *reached.entry(&far.segment).or_default() |= is_reached;
        }
        let segments = self.targets.segments.iter().enumerate();
        segments
            .filter(|(_, name)| reached.get(name) == Some(&false))
            .map(|(number, _)| number)
            .collect()
    }

    /// The relay on a path.
    pub(super) fn via(&self, key: &Key) -> Option<Via> {
        let lead = self.targets.lead.as_ref()?;
        let Key::Peer(id) = key else { return None };
        let far = lead.peers.get(id)?;
        let relay = self.reach.relays.relay(&far.segment)?;
        let by = lead.peers.get(&relay.peer)?;
        lead.relayed.contains(id).then(|| Via {
            node: by.node.clone(),
            segment: by.segment.clone(),
            since: relay.since,
        })
    }
}
