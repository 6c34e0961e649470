package plugin

// DefaultEventSocket is the agent's Unix socket that the plugin talks to.
const DefaultEventSocket = "/var/run/istio-cni/pluginevent.sock"

// Paths of the agent's HTTP interface on its Unix socket. All take POST with an Event, except StatusPath (GET).
const (
	AddPath    = "/cmdadd"
	DelPath    = "/cmddel"
	CheckPath  = "/cmdcheck"
	StatusPath = "/status"
)

// MaxEvent bounds an encoded Event, in bytes.
const MaxEvent = 64 << 10

// Event is what the plugin tells the agent of a pod's sandbox. The first four fields have the names that other agents
// and plugins use.
type Event struct {
	// Netns is the path of the sandbox's network namespace.
	Netns        string
	PodName      string
	PodNamespace string
	IPs          []IPConfig
	// PodUID is the pod's metadata.uid, or for a static pod its configuration's hash.
	PodUID      string `json:",omitempty"`
	ContainerID string `json:",omitempty"`
}

// IPConfig is one address of the sandbox.
type IPConfig struct {
	// Interface is the position of its interface in the CNI result.
	Interface *int `json:",omitempty"`
	// Address is in CIDR form.
	Address string
}

// Answer is the agent's answer to an Event that it accepted (status 200); with any other status the body is text that
// says why not. Status 503 says that the agent cannot tell whether the pod is to be in the mesh, as when it starts; after others
// the plugin looks no further.
type Answer struct {
	// Redirected tells whether the pod is in the mesh.
	Redirected bool
	// Reason says why, or why not.
	Reason string `json:",omitempty"`
}
