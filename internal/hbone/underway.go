package hbone

import (
	"time"

	"golang.org/x/sys/unix"
)

// firstUnderWay is how much a peer may have on its way to an event loop at first, in bytes: enough for both ends' turns.
const firstUnderWay = 4 << 20

// pace is how much a peer may have on its way to this side. What is on its way stands in sockets' buffers, in one order,
// so that a small message waits for all of it. It is doubled while the link's delay alone needs more than half of it.
// The tunnel's driver owns it.
type pace struct {
	bound    int
	received int           // since
	since    time.Duration // on the driver's clock
}

// got counts n bytes from the peer. delay is asked now and then: the round trip of the link when nothing waits in it.
// true says that the bound has changed.
func (p *pace) got(n int, now time.Duration, delay func() time.Duration) bool {
	if p.received += n; p.received < p.bound {
		return false
	}
	passed := max(now-p.since, time.Microsecond)
	needed := 2 * float64(p.received) * float64(delay()) / float64(passed)
	p.received, p.since = 0, now
	if needed <= float64(p.bound) || p.bound >= connWindow {
		return false
	}
	p.bound *= 2
	return true
}

// adapt lets the peer send more, as far as there is room and use for it.
func (t *loopTunnel) adapt(n int) {
	if more := t.window.got(n); more > 0 {
		t.m.Grow(more)
	}
	if t.pace.got(n, t.w.now, t.delay) {
		t.m.BoundUnderWay(t.pace.bound)
	}
}

// delay is the shortest round trip that the kernel has seen on the tunnel's connection.
func (t *loopTunnel) delay() time.Duration {
	info, err := unix.GetsockoptTCPInfo(t.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return time.Duration(info.Min_rtt) * time.Microsecond
}
