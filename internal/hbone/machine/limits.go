package machine

import "time"

// A peer may do some things only so often, because each costs this side more than it costs the peer. One purse pays for
// all of them and fills up with time; a peer that empties it is told ENHANCE_YOUR_CALM. The costs let every sane peer
// pass: gRPC's bandwidth probes send a PING per round trip, a health checker resets a few streams a second.
const (
	budgetMax       = 20000
	budgetPerSecond = 10000

	costPing     = 1
	costTiny     = 1  // WINDOW_UPDATE by less than tinyWindow
	costEmpty    = 1  // DATA or CONTINUATION without bytes, PRIORITY, frames of unknown type, frames on closed streams
	costSettings = 50 // touches every stream
	costReset    = 20 // of a stream that was not answered yet, or one that was refused: the rapid reset attack
)

// tinyWindow is the least opening of a window that is worth its answer, in bytes. Sane peers gather more.
const tinyWindow = 1024

// spendOpening pays for a window that was opened by n bytes.
func (c *Conn) spendOpening(n int64) error {
	if n >= tinyWindow {
		return nil
	}
	return c.spend(costTiny)
}

type budget struct {
	tokens int
	last   time.Duration
}

func (b *budget) advance(now time.Duration) {
	d := now - b.last
	if d < 10*time.Millisecond {
		return
	}
	b.last = now
	b.tokens = min(budgetMax, b.tokens+int(min(d, 2*time.Second)*budgetPerSecond/time.Second))
}

// spend takes cost and breaks the connection when there is nothing left, or when the peer does not read its answers.
func (c *Conn) spend(cost int) error {
	if c.budget.tokens -= cost; c.budget.tokens < 0 {
		return c.fail(CodeCalm, "too many frames that ask for work")
	}
	if len(c.out)-c.outn > maxOutput {
		return c.fail(CodeCalm, "the answers are not read")
	}
	return nil
}
