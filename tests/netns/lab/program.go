package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// Names by which the executable is started again as something else.
const (
	podProgram = "lab-pod"
	wirePlugin = "lab-wire"
	// Kubelet calls from a node. It has its real name because probes are known by it.
	Kubelet = "kubelet"
	// HostProcess calls from a node too.
	HostProcess = "lab-host"
)

// RunIfChild runs the program of a pod, a node's kubelet or the lab's CNI plugin, and does not return, when the process
// was started as one of them. Otherwise it returns at once.
func RunIfChild() {
	switch filepath.Base(os.Args[0]) {
	case podProgram:
		runProgram(true)
	case Kubelet, HostProcess:
		runProgram(false)
	case wirePlugin:
		runWirePlugin()
	default:
		return
	}
	os.Exit(0)
}

// request is a Call on its way to a program; the same number without a call cancels it.
type request struct {
	Number int   `json:"number"`
	Call   *Call `json:"call,omitempty"`
}

// readyNumber numbers the response that a program sends unasked, once it listens.
const readyNumber = 0

type response struct {
	Number int    `json:"number"`
	Answer Answer `json:"answer"`
}

// program is a running pod program as the lab sees it: it takes calls over a socket.
type program struct {
	*process
	conn *os.File

	mu      sync.Mutex
	next    int
	waiting map[int]chan Answer
}

// startProgram starts one of the executable's other selves on a thread.
func (t *thread) startProgram(logs string, c command) (*program, error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "lab"), os.NewFile(uintptr(pair[1]), "program")
	defer theirs.Close()
	c.files = []*os.File{theirs}
	process, err := t.start(logs, c)
	if err != nil {
		ours.Close()
		return nil, err
	}
	ready := make(chan Answer, 1)
	p := &program{process: process, conn: ours, waiting: map[int]chan Answer{readyNumber: ready}}
	go p.read()
	a, ok := <-ready
	if _, err := p.answered(a, ok); err != nil {
		p.end()
		return nil, err
	}
	return p, nil
}

// read hands the answers out until the program ends.
func (p *program) read() {
	for d := json.NewDecoder(p.conn); ; {
		var r response
		if err := d.Decode(&r); err != nil {
			break
		}
		p.mu.Lock()
		if w := p.waiting[r.Number]; w != nil {
			w <- r.Answer
			delete(p.waiting, r.Number)
		}
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for n, w := range p.waiting {
		close(w)
		delete(p.waiting, n)
	}
	p.waiting = nil
}

// call asks the program to make a call and waits for what comes of it. When ctx ends first, the program stops trying
// and answers what it has.
func (p *program) call(ctx context.Context, c Call) (Answer, error) {
	answer := make(chan Answer, 1)
	p.mu.Lock()
	if p.waiting == nil {
		p.mu.Unlock()
		return Answer{}, fmt.Errorf("%s has ended; %s", p.name, p.tail())
	}
	p.next++
	number := p.next
	p.waiting[number] = answer
	err := json.NewEncoder(p.conn).Encode(request{Number: number, Call: &c})
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, number)
		p.mu.Unlock()
	}()
	if err != nil {
		return Answer{}, fmt.Errorf("ask %s to call: %w", p.name, err)
	}
	select {
	case <-ctx.Done():
		p.mu.Lock()
		err := json.NewEncoder(p.conn).Encode(request{Number: number})
		p.mu.Unlock()
		if err != nil {
			return Answer{}, err
		}
	case a, ok := <-answer:
		return p.answered(a, ok)
	}
	a, ok := <-answer
	return p.answered(a, ok)
}

func (p *program) answered(a Answer, ok bool) (Answer, error) {
	if !ok {
		return Answer{}, fmt.Errorf("%s ended before it answered; %s", p.name, p.tail())
	}
	return a, nil
}

// end ends the program and forgets it.
func (p *program) end() {
	if p == nil {
		return
	}
	p.kill()
	p.conn.Close()
}
