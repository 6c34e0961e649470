package zds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// Server is the agent's end: it holds the pods of the node and tells the connected proxy of them.
//
// Two proxies may be connected at once, during an upgrade. The one that connected last counts: it alone is told of pods
// that come, because whoever is told takes the pod's connections over. When it goes and the other stays, that one is told
// of all pods again, and so takes them back.
type Server struct {
	log *zap.Logger

	mu     sync.Mutex
	pods   map[string]*pod
	peers  []*peer // oldest first
	synced bool
	admit  func(pid int) error
	// changed is closed and replaced whenever an answer came, or a proxy came or went.
	changed chan struct{}
}

// pod is one pod in the server's set. Its description does not change: a new Add makes a new pod.
type pod struct {
	w Workload // Netns nil: the namespace cannot be opened, the proxy keeps what it has
	// answers holds what each proxy said to this description. The server's lock guards it.
	answers map[*peer]error
}

// Peer is one connected proxy.
type Peer struct {
	// PID is the proxy's process, as the agent's PID namespace numbers it (SO_PEERCRED); 0 when it is in none below.
	PID       int
	Connected time.Time
}

// NewServer makes a server without pods.
func NewServer(log *zap.Logger) *Server {
	return &Server{log: log, pods: map[string]*pod{}, changed: make(chan struct{})}
}

// Admit sets who decides on a proxy that has connected, before it is told of any pod: an error turns it away. Set it before
// Serve. admit must not call the server.
func (s *Server) Admit(admit func(pid int) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.admit = admit
}

// admits asks the one who decides.
func (s *Server) admits(pid int) error {
	s.mu.Lock()
	admit := s.admit
	s.mu.Unlock()
	if admit == nil {
		return nil
	}
	return admit(pid)
}

// Synced says that the set holds every pod the agent knows of. Only then do proxies get SnapshotSent, upon which they
// drop the pods they were not told of: an agent that has just started must name its pods (Add, Keep) before.
func (s *Server) Synced() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.synced {
		return
	}
	s.synced = true
	for _, p := range s.peers {
		p.push(step{snapshot: true})
	}
}

// Keep puts a pod in the set whose network namespace cannot be opened: a proxy that has it is to keep it.
func (s *Server) Keep(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods[uid] == nil {
		s.pods[uid] = &pod{w: Workload{UID: uid}, answers: map[*peer]error{}}
	}
}

// Add puts a pod in the set and tells the proxy that counts. It returns nil once the proxy that connected last has
// accepted the pod and the proxy's error when it refused; with no proxy connected it waits for one until ctx ends. The
// pod stays in the set whatever Add returns, until Delete. w.Netns stays the caller's: the server holds a duplicate.
func (s *Server) Add(ctx context.Context, w Workload) error {
	netns, err := duplicate(w.Netns)
	if err != nil {
		return fmt.Errorf("add pod %s/%s: %w", w.Namespace, w.Name, err)
	}
	w.Netns = netns
	added := &pod{w: w, answers: map[*peer]error{}}
	s.mu.Lock()
	if old := s.pods[w.UID]; old != nil && old.w.Netns != nil {
		old.w.Netns.Close()
	}
	s.pods[w.UID] = added
	if p := s.newest(); p != nil {
		p.push(step{add: added})
	}
	s.signal()
	s.mu.Unlock()
	return s.await(ctx, added)
}

// await returns the newest proxy's answer to a pod.
func (s *Server) await(ctx context.Context, added *pod) error {
	for {
		s.mu.Lock()
		current := s.pods[added.w.UID] == added
		newest := s.newest()
		answer, answered := added.answers[newest]
		changed := s.changed
		s.mu.Unlock()
		switch {
		case !current:
			return fmt.Errorf("add pod %s/%s: deleted or added again meanwhile", added.w.Namespace, added.w.Name)
		case answered && answer != nil:
			return fmt.Errorf("the node proxy refused pod %s/%s: %w", added.w.Namespace, added.w.Name, answer)
		case answered:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if newest == nil {
				return fmt.Errorf("add pod %s/%s: no node proxy is connected: %w", added.w.Namespace, added.w.Name, ctx.Err())
			}
			return fmt.Errorf("add pod %s/%s: the node proxy has not answered: %w", added.w.Namespace, added.w.Name, ctx.Err())
		}
	}
}

// Delete takes a pod out of the set and tells every connected proxy. It returns once each of them has answered or gone,
// or ctx has ended. A pod that is not there is no error.
func (s *Server) Delete(ctx context.Context, uid string) error {
	s.mu.Lock()
	gone := s.pods[uid]
	if gone == nil {
		s.mu.Unlock()
		return nil
	}
	delete(s.pods, uid)
	if gone.w.Netns != nil {
		gone.w.Netns.Close()
	}
	var waiting []chan struct{}
	for _, p := range s.peers {
		done := make(chan struct{})
		p.push(step{del: uid, done: done})
		waiting = append(waiting, done)
	}
	s.signal()
	s.mu.Unlock()
	for _, done := range waiting {
		select {
		case <-done:
		case <-ctx.Done():
			return fmt.Errorf("delete pod %s: %w", uid, ctx.Err())
		}
	}
	return nil
}

// Peers lists the connected proxies, oldest first.
func (s *Server) Peers() []Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var peers []Peer
	for _, p := range s.peers {
		peers = append(peers, Peer{PID: p.pid, Connected: p.since})
	}
	return peers
}

// Serve listens on socket until ctx ends. The socket is for its owner only (0600); one that a former agent left behind
// is replaced.
func (s *Server) Serve(ctx context.Context, socket string) error {
	l, err := Listen("unixpacket", socket)
	if err != nil {
		return fmt.Errorf("serve node proxies: %w", err)
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var peers sync.WaitGroup
	defer peers.Wait()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("listen for node proxies: %w", err)
		}
		peers.Go(func() { s.ServeConn(ctx, conn) })
	}
}

// ServeConn serves one proxy on a connected socket, which it owns, until either side ends it or ctx ends.
func (s *Server) ServeConn(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	pid, err := peerPID(conn)
	if err == nil {
		err = hello(conn)
	}
	if err == nil {
		err = s.admits(pid)
	}
	if err != nil {
		s.log.Warn("refused a node proxy", zap.Int("pid", pid), zap.Error(err))
		return
	}
	p := s.join(conn, pid)
	s.log.Info("node proxy connected", zap.Int("pid", pid))
	err = p.run(s)
	s.leave(p)
	s.log.Info("node proxy gone", zap.Int("pid", pid), zap.Error(err))
}

// join makes a peer that is told of the whole set first.
func (s *Server) join(conn *net.UnixConn, pid int) *peer {
	p := &peer{conn: conn, pid: pid, since: time.Now(), wake: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pod := range s.pods {
		p.push(step{add: pod})
	}
	if s.synced {
		p.push(step{snapshot: true})
	}
	s.peers = append(s.peers, p)
	s.signal()
	return p
}

func (s *Server) leave(p *peer) {
	s.mu.Lock()
	counted := s.newest() == p
	s.peers = slices.DeleteFunc(s.peers, func(o *peer) bool { return o == p })
	next := s.newest()
	for _, pod := range s.pods {
		delete(pod.answers, p)
		// What the next one has said before was about a time when its listeners were in place.
		if counted && next != nil && pod.w.Netns != nil {
			delete(pod.answers, next)
			next.push(step{add: pod})
		}
	}
	p.abandon()
	s.signal()
	s.mu.Unlock()
}

// newest is the proxy that counts, or nil. The lock is held.
func (s *Server) newest() *peer {
	if len(s.peers) == 0 {
		return nil
	}
	return s.peers[len(s.peers)-1]
}

// current is what is known of a pod now, or nil.
func (s *Server) current(uid string) *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pods[uid]
}

// answered records what a proxy said to a pod.
func (s *Server) answered(p *peer, pod *pod, answer error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pod.answers[p] = answer
	s.signal()
}

// signal wakes those who wait for a change. The lock is held.
func (s *Server) signal() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// hello waits for the proxy's greeting.
func hello(conn *net.UnixConn) error {
	if err := conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	var greeting zds.ZdsHello
	files, err := receive(conn, &greeting)
	closeAll(files)
	if err != nil {
		return err
	}
	if greeting.GetVersion() != zds.Version_V1 {
		return fmt.Errorf("it speaks version %v, want %v", greeting.GetVersion(), zds.Version_V1)
	}
	return nil
}

func peerPID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("read the peer's credentials: %w", err)
	}
	return int(cred.Pid), nil
}

// duplicate makes a second descriptor of the same file, closed on exec.
func duplicate(f *os.File) (*os.File, error) {
	if f == nil {
		return nil, errors.New("no network namespace is given")
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	err = raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("duplicate the network namespace's descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
