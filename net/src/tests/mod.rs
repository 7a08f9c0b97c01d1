//! Tests of networks in one process that connect over loopback: admission, hostile peers, links.

mod admission;
mod hostile;
mod link;
mod loopback;
mod trouble;
