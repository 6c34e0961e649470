package zds

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// peer is one connected proxy and what it is still to be told.
type peer struct {
	conn  *net.UnixConn
	pid   int
	since time.Time

	mu    sync.Mutex
	queue []step
	gone  bool
	wake  chan struct{} // one token: the queue is not empty
}

// step is one thing to tell a proxy.
type step struct {
	add      *pod
	del      string
	snapshot bool
	done     chan struct{} // closed when told, or never to be
}

// push puts a step at the end of the queue.
func (p *peer) push(st step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		st.finish()
		return
	}
	p.queue = append(p.queue, st)
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *peer) pop() (step, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return step{}, false
	}
	st := p.queue[0]
	p.queue = p.queue[1:]
	return st, true
}

// abandon lets go of those who wait for steps that will not be told.
func (p *peer) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	for _, st := range p.queue {
		st.finish()
	}
	p.queue = nil
}

func (st step) finish() {
	if st.done != nil {
		close(st.done)
	}
}

// run tells the proxy one step after another until the connection ends; the error says why it did.
func (p *peer) run(s *Server) error {
	lost := make(chan error, 1)
	answers := make(chan *zds.WorkloadResponse)
	stop := make(chan struct{})
	defer close(stop)
	go p.read(answers, lost, stop)
	for {
		st, ok := p.pop()
		if !ok {
			select {
			case <-p.wake:
				continue
			case err := <-lost:
				return err
			case <-answers:
				return errors.New("it answered what it was not asked")
			}
		}
		err := p.tell(s, st, answers, lost)
		st.finish()
		if err != nil {
			return err
		}
	}
}

// read passes on the proxy's answers; reading all the time is how an idle proxy's end is noticed.
func (p *peer) read(answers chan<- *zds.WorkloadResponse, lost chan<- error, stop <-chan struct{}) {
	if err := p.conn.SetReadDeadline(time.Time{}); err != nil {
		lost <- err
		return
	}
	for {
		var response zds.WorkloadResponse
		files, err := receive(p.conn, &response)
		closeAll(files)
		if err != nil {
			lost <- err
			return
		}
		select {
		case answers <- &response:
		case <-stop:
			return
		}
	}
}

// tell sends one step and waits for the answer. An error is the connection's; a refusal is recorded with the pod.
func (p *peer) tell(s *Server, st step, answers <-chan *zds.WorkloadResponse, lost <-chan error) error {
	err := p.send(st)
	for ; errors.Is(err, os.ErrClosed) && st.add != nil; err = p.send(st) {
		// The pod was added again while its turn had not come: it is named here all the same, or a snapshot that comes before the
		// new turn would have the proxy drop it.
		if st.add = s.current(st.add.w.UID); st.add == nil {
			return nil // it was deleted, and its delete follows
		}
	}
	if err != nil {
		return err
	}
	timeout := time.NewTimer(answerTimeout)
	defer timeout.Stop()
	select {
	case response := <-answers:
		ack := response.GetAck()
		if ack == nil {
			return errors.New("it gave an answer of a kind that this agent does not know")
		}
		if st.add == nil {
			return nil
		}
		var answer error
		if ack.GetError() != "" {
			answer = errors.New(ack.GetError())
		}
		s.answered(p, st.add, answer)
		return nil
	case err := <-lost:
		return err
	case <-timeout.C:
		return fmt.Errorf("no answer for %v", answerTimeout)
	}
}

// send writes the request of a step.
func (p *peer) send(st step) error {
	switch {
	case st.snapshot:
		return send(p.conn, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}}, -1)
	case st.add == nil:
		return send(p.conn, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: st.del}}}, -1)
	}
	w := st.add.w
	if w.Netns == nil {
		return send(p.conn, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{Keep: &zds.KeepWorkload{Uid: w.UID}}}, -1)
	}
	request := &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{
		Uid:          w.UID,
		WorkloadInfo: &zds.WorkloadInfo{Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
	}}}
	// The raw connection keeps the descriptor open until it is sent, even if the pod is deleted meanwhile.
	raw, err := w.Netns.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) { sendErr = send(p.conn, request, int(fd)) }); err != nil {
		return fmt.Errorf("network namespace of pod %s/%s: %w", w.Namespace, w.Name, os.ErrClosed)
	}
	return sendErr
}
