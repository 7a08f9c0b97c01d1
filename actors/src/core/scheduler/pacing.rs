//! The length of drafts: they grow while they are accepted, shrink when they are rejected, and pause after rejections,
//! so that text that cannot be foreseen costs little.

/// The longest pause after rejected drafts, in drafts.
const PAUSE_MAX: u32 = 32;

/// The pacing of one source of drafts in one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pacing {
    /// Tokens of the first draft, and of one after a rejection.
    first: usize,
    /// The most tokens of a draft.
    most: usize,
    /// Tokens of the next draft.
    length: usize,
    /// Drafts that are skipped before the next one.
    pause: u32,
    /// The pause after the next rejected draft.
    next_pause: u32,
}

impl Pacing {
    pub(super) const fn new(first: usize, most: usize) -> Self {
        Self { first, most, length: first, pause: 0, next_pause: 1 }
    }

    /// The length of the next draft, at most `most` tokens; `None` without room, and in a pause, which this call
    /// shortens.
    pub(super) fn next(&mut self, most: usize) -> Option<usize> {
        if most == 0 {
            return None;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        Some(most.min(self.length))
    }

    /// Adapts to the fate of a draft.
    pub(super) fn learn(&mut self, drafted: usize, accepted: usize) {
        if accepted == 0 {
            return self.reject();
        }
        self.next_pause = 1;
        self.length = if accepted == drafted { (self.length * 2).min(self.most) } else { accepted.max(self.first) };
    }

    /// Adapts to a draft of which nothing was accepted.
    pub(super) fn reject(&mut self) {
        self.length = self.first;
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_drafts_grow_and_rejected_ones_pause() {
        let mut pacing = Pacing::new(3, 15);
        let mut lengths = Vec::new();
        for _ in 0..4 {
            let length = pacing.next(100).expect("no pause");
            lengths.push(length);
            pacing.learn(length, length);
        }
        assert_eq!(lengths, [3, 6, 12, 15]);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push((0..).take_while(|_| pacing.next(100).is_none()).count());
            pacing.learn(3, 0);
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 32]);
        pacing.learn(3, 1);
        pacing.learn(3, 0);
        assert_eq!((0..).take_while(|_| pacing.next(100).is_none()).count(), 1);
        assert_eq!((pacing.next(0), pacing.next(2)), (None, Some(2)), "the room bounds a draft");
    }
}
