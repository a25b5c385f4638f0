//! A policy and the rule by which its replays stop: `NAME`, `NAME:own` or `NAME:budget`.

use std::str::FromStr;

use super::replay::StopAt;
use crate::forecast::PolicyKind;

/// What is compared with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// As the user wrote it.
    pub word: String,
    /// Which page goes next.
    pub policy: PolicyKind,
    /// When it ends.
    pub stop: StopAt,
}

impl Contender {
    /// A policy under the stop rule that goes without saying: its own, but for `xen-skip`, which would run on until 50
    /// pages are left and serves as the yardstick of orders when it stops at the budget.
    pub fn plain(policy: PolicyKind) -> Self {
        let stop = if policy == PolicyKind::XenSkip { StopAt::Budget } else { StopAt::Own };
        Contender { word: policy.to_string(), policy, stop }
    }

    /// What other policies have to beat: what Xen did up to 4.5, stopped as soon as the budget allows.
    pub fn yardstick() -> Self {
        Contender::plain(PolicyKind::XenSkip)
    }

    /// What Xen 4.6 and later does.
    pub fn stock_xen() -> Self {
        Contender::plain(PolicyKind::Xen)
    }

    /// Whether both do the same thing, whatever they are called.
    pub fn same_as(&self, other: &Contender) -> bool {
        (self.policy, self.stop) == (other.policy, other.stop)
    }
}

impl FromStr for Contender {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let (name, rule) = word.split_once(':').map_or((word, None), |(name, rule)| (name, Some(rule)));
        let policy: PolicyKind = name.parse().map_err(|error| format!("{error}"))?;
        let stop = match rule {
            None => Contender::plain(policy).stop,
            Some("own") => StopAt::Own,
            Some("budget") => StopAt::Budget,
            Some(other) => {
                return Err(format!(
                    "{other:?} is no stop rule; write {name}:own for the policy's own or {name}:budget"
                ));
            }
        };
        Ok(Contender { word: word.to_owned(), policy, stop })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_names_a_policy_and_its_stop_rule() {
        for (word, policy, stop) in [
            ("ar", PolicyKind::Ar, StopAt::Own),
            ("xen", PolicyKind::Xen, StopAt::Own),
            ("xen-skip", PolicyKind::XenSkip, StopAt::Budget),
            ("xen-skip:own", PolicyKind::XenSkip, StopAt::Own),
            ("heat:budget", PolicyKind::Heat, StopAt::Budget),
        ] {
            assert_eq!(word.parse(), Ok(Contender { word: word.to_owned(), policy, stop }));
        }
        assert!("ar:soon".parse::<Contender>().unwrap_err().contains("ar:budget"));
        assert!("best".parse::<Contender>().unwrap_err().contains("xen-skip"));
    }
}
