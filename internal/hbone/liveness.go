package hbone

import (
	"errors"
	"time"
)

var errSilent = errors.New("the peer gives no sign of life")

// liveness decides when a silent peer is asked for a sign of life and when it is given up.
type liveness struct {
	interval, wait time.Duration // as tunnelConfig's ping and pingWait
	heard          time.Time     // of the last bytes
	asked          time.Time     // zero when no answer is owed
}

// check returns what to do now and when to check again.
func (l *liveness) check(now time.Time) (ask, dead bool, next time.Duration) {
	if l.asked.IsZero() || l.heard.After(l.asked) {
		l.asked = time.Time{}
		if silent := now.Sub(l.heard); silent < l.interval {
			return false, false, l.interval - silent
		}
		l.asked = now
		return true, false, l.wait
	}
	if waited := now.Sub(l.asked); waited < l.wait {
		return false, false, l.wait - waited
	}
	return false, true, 0
}
