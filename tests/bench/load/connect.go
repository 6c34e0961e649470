package load

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// attempt is one connection of the connect client: it is made, a message goes out and comes back, the server closes.
type attempt struct {
	began time.Time
	sent  bool
	got   int
}

// connect makes connections, several at once, each of which carries one message there and back.
func connect(c Client) (Result, error) {
	addr, err := c.address(PortOnce)
	if err != nil {
		return Result{}, err
	}
	debug.SetGCPercent(400)
	run := &connecting{Client: c, addr: addr, attempts: map[int]*attempt{}, message: make([]byte, c.Size), buffer: make([]byte, 4096)}
	if run.poller, err = newPoller(); err != nil {
		return Result{}, err
	}
	run.begin = time.Now().Add(c.Warm)
	run.end = run.begin.Add(c.Duration)
	for range c.Connections {
		run.next()
	}
	for len(run.attempts) > 0 {
		events, err := run.poller.wait(patience)
		if err != nil {
			return run.result, err
		}
		if len(events) == 0 {
			for range run.attempts {
				run.result.failed(fmt.Errorf("no answer in %v", patience))
			}
			break
		}
		for _, e := range events {
			run.ready(int(e.Fd))
		}
	}
	run.result.Rate = float64(len(run.took)) / c.Duration.Seconds()
	run.result.latencies(run.took)
	return run.result, nil
}

type connecting struct {
	Client
	addr       netip.AddrPort
	poller     *poller
	attempts   map[int]*attempt
	message    []byte
	buffer     []byte
	begin, end time.Time
	result     Result
	took       []int64
}

// next begins a connection, unless the time is over. Failures are followed by another attempt, a bounded number of times.
func (r *connecting) next() {
	for time.Now().Before(r.end) && r.result.Errors < 1000 {
		began := time.Now()
		fd, err := dial(r.addr)
		if err == nil {
			if err = r.poller.add(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET); err == nil {
				r.attempts[fd] = &attempt{began: began}
				return
			}
			unix.Close(fd)
		}
		r.result.failed(err)
	}
}

// ready goes on with a connection as far as it can.
func (r *connecting) ready(fd int) {
	a := r.attempts[fd]
	if a == nil {
		return
	}
	done, err := r.step(fd, a)
	if err == nil && !done {
		return
	}
	unix.Close(fd)
	delete(r.attempts, fd)
	if err != nil {
		r.result.failed(err)
	} else {
		r.result.Units++
		if a.began.After(r.begin) {
			r.took = append(r.took, int64(time.Since(a.began)))
		}
	}
	r.next()
}

func (r *connecting) step(fd int, a *attempt) (done bool, err error) {
	if !a.sent {
		if err := socketError(fd); err != nil {
			return false, fmt.Errorf("connect: %w", err)
		}
		err := writeAll(fd, r.message)
		if errors.Is(err, unix.EAGAIN) {
			return false, nil // not connected yet
		}
		if err != nil {
			return false, fmt.Errorf("send: %w", err)
		}
		a.sent = true
	}
	for {
		n, err := unix.Read(fd, r.buffer)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("receive: %w", err)
		case n > 0:
			a.got += n
		case a.got != r.Size:
			return false, fmt.Errorf("%d bytes came back of %d", a.got, r.Size)
		default:
			return true, nil
		}
	}
}
