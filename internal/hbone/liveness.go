package hbone

import (
	"errors"
	"time"
)

var (
	errSilent = errors.New("the peer gives no sign of life")
	errUnread = errors.New("the peer does not read")
)

// liveness decides when a silent peer is asked for a sign of life and when it is given up, and when one that sends but
// does not read is.
type liveness struct {
	interval, wait time.Duration // as tunnelConfig's ping and pingWait
	heard          time.Time     // of the last bytes
	asked          time.Time     // zero when no answer is owed
	stuck          time.Time     // since when the socket takes no more; zero while it does
}

// check returns what to do now and when to check again.
func (l *liveness) check(now time.Time) (ask bool, dead error, next time.Duration) {
	if !l.stuck.IsZero() && now.Sub(l.stuck) >= l.interval+l.wait {
		return false, errUnread, 0
	}
	if l.asked.IsZero() || l.heard.After(l.asked) {
		l.asked = time.Time{}
		if silent := now.Sub(l.heard); silent < l.interval {
			return false, nil, l.interval - silent
		}
		l.asked = now
		return true, nil, l.wait
	}
	if waited := now.Sub(l.asked); waited < l.wait {
		return false, nil, l.wait - waited
	}
	return false, errSilent, 0
}

// idling decides when a server's tunnel has carried nothing for so long that its end is better than its upkeep. Clients
// release their tunnels themselves; this is for those that do not.
type idling struct {
	after time.Duration // as tunnelConfig's idle
	since time.Time     // when it was first seen without streams
	last  uint32        // the newest stream then
}

// over looks from time to time: streams are open now, and newest was the last to be opened.
func (i *idling) over(now time.Time, streams int, newest uint32) bool {
	if i.after <= 0 {
		return false
	}
	if streams > 0 || i.since.IsZero() || newest != i.last {
		i.since, i.last = now, newest
		return false
	}
	return now.Sub(i.since) >= i.after
}
