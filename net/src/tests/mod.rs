//! Networks of this process that meet over loopback: which peers are admitted, what hostile peers achieve, what links
//! carry.

mod admission;
mod hostile;
mod link;
mod loopback;
